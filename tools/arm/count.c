/* QEMU TCG plugin (API v1, declared here because Debian packages no header): counts the instructions that run between
 * `hint #0x6e` and `hint #0x6f`, two no-ops of the architecture, and prints a line of totals by class at each end.
 * Counts do not depend on time or load: the same program on one thread gives the same numbers.
 * build: gcc -O2 -fPIC -shared count.c -o libcount.so      run: qemu-aarch64 -plugin libcount.so -d plugin PROGRAM */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb*));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn*);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, int op, void*, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn*, int op, void*, uint64_t);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn*, void (*)(unsigned, void*), int flags, void*);
void qemu_plugin_outs(const char*);

#define EXPORT __attribute__((visibility("default")))
enum { add_u64 = 0, begin = 0xD5032DDF, end = 0xD5032DFF };
enum { vector_load, vector_store, fma, vector_other, scalar_memory, branch, integer, classes };
static const char* name[] = {"vector_load", "vector_store", "fma", "vector_other", "scalar_memory", "branch", "integer"};
static uint64_t count[classes], at_begin[classes];

static int class_of(uint32_t w) {
  const unsigned group = w >> 25 & 15;
  if ((group & 5) == 4) { /* loads and stores; bit 26: SIMD and floating point registers, bit 22: load */
    if (!(w >> 26 & 1)) return scalar_memory;
    return (w & 0x3B000000) == 0x18000000 || w >> 22 & 1 ? vector_load : vector_store;
  }
  if ((group & 7) == 7) {
    const int by_vector = (w & 0xBF20FC00) == 0x0E20CC00;  /* FMLA, FMLS .4s .2d */
    const int by_element = (w & 0xBF80B400) == 0x0F801000; /* FMLA, FMLS by element */
    const int bf16 = (w & 0xFFE0FC00) == 0x6E40EC00 || (w & 0xBFE0FC00) == 0x2E40FC00 || (w & 0xBFC0F400) == 0x0F40F000;
    return by_vector || by_element || bf16 || (w & 0xFF000000) == 0x1F000000 ? fma : vector_other;
  }
  return (group & 14) == 10 ? branch : integer;
}

static void at_mark(unsigned cpu, void* is_end) {
  (void)cpu;
  if (!is_end) {
    memcpy(at_begin, count, sizeof count);
    return;
  }
  char line[400];
  int n = snprintf(line, sizeof line, "counted");
  for (int i = 0; i < classes; i++)
    n += snprintf(line + n, sizeof line - n, " %s=%llu", name[i], (unsigned long long)(count[i] - at_begin[i]));
  snprintf(line + n, sizeof line - n, "\n");
  qemu_plugin_outs(line);
}

/* Whole translation blocks are counted at once, except for those that hold a mark. */
static void at_translation(plugin_id id, struct qemu_plugin_tb* tb) {
  (void)id;
  const size_t n = qemu_plugin_tb_n_insns(tb);
  uint64_t of_class[classes] = {0};
  int marked = 0;
  for (size_t i = 0; i < n; i++) {
    uint32_t w;
    memcpy(&w, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
    marked |= w == begin || w == end;
    of_class[class_of(w)]++;
  }
  for (int c = 0; !marked && c < classes; c++)
    if (of_class[c]) qemu_plugin_register_vcpu_tb_exec_inline(tb, add_u64, &count[c], of_class[c]);
  for (size_t i = 0; marked && i < n; i++) {
    struct qemu_plugin_insn* insn = qemu_plugin_tb_get_insn(tb, i);
    uint32_t w;
    memcpy(&w, qemu_plugin_insn_data(insn), 4);
    if (w == begin || w == end) qemu_plugin_register_vcpu_insn_exec_cb(insn, at_mark, 0, w == end ? insn : NULL);
    else qemu_plugin_register_vcpu_insn_exec_inline(insn, add_u64, &count[class_of(w)], 1);
  }
}

EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(plugin_id id, const void* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, at_translation);
  return 0;
}
