"""What people do with a network that trains: processes, averages, scalers, transforms; fused as stock."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fused_models import NETWORKS
from small import images, network, randomise
from torch import nn

import mnops

X = images(8, 32, dtype=torch.float64)
LABELS = torch.arange(8) % 5


def own():
    return network().double().train()


def other():
    torch.manual_seed(0)
    model = NETWORKS["v3"]().double()
    model(X)  # LazyLinear
    return mnops.fuse(randomise(model))


def stock_of(model):
    stock = mnops.unfuse(copy.deepcopy(model))
    if isinstance(stock, mnops.MobileNet):
        stock.fused = False
    return stock


MODELS = {"MobileNet": own, "fused": other}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def step(model, x=X, labels=LABELS):
    """The mean loss of the batch, gradients left in the parameters."""
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    return loss.detach()


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# ---- two processes ----

WORLD = 2


def synchronised(model):
    """After DDP, which refuses SyncBatchNorm on the CPU, where torch's own cannot run."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def data_parallel(model):
    return synchronised(nn.parallel.DistributedDataParallel(model))


def converted_before_fusing(model):
    return mnops.fuse(data_parallel(mnops.unfuse(model)))


def sharded(model):
    """FSDP2: each block, then the rest."""
    from torch.distributed.fsdp import fully_shard

    model = synchronised(model)
    for part in model.blocks if isinstance(model, mnops.MobileNet) else list(model.children())[:-1]:
        fully_shard(part)
    return fully_shard(model)


CASES = {
    "MobileNet, DDP": (own, data_parallel),
    "MobileNet, FSDP2": (own, sharded),
    "fused, then converted, DDP": (other, data_parallel),
    "converted, then fused, DDP": (other, converted_before_fusing),
    "fused, FSDP2": (other, sharded),
}


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def two_steps(model, mine=slice(None)):
    """Losses, gradients, weights and statistics after each of two steps of SGD."""
    optimizer, results = torch.optim.SGD(model.parameters(), 0.1), {}
    for i in range(2):
        optimizer.zero_grad()
        results[f"loss {i}"] = step(model, X[mine], LABELS[mine])
        for name, p in model.named_parameters():
            results[f"{name} {i}.grad"] = whole(p.grad).clone()
        optimizer.step()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        results[name] = whole(t.detach()).clone()
    return {name.removeprefix("module."): t for name, t in results.items()}


def one_process(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD)
    share = len(X) // WORLD
    results = {}
    for name, (make, distribute) in CASES.items():
        model = distribute(make())
        results[name] = two_steps(model, slice(rank * share, (rank + 1) * share))
        dist.all_reduce(results[name]["loss 0"]), dist.all_reduce(results[name]["loss 1"])
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    mp.spawn(one_process, (str(path),), nprocs=WORLD)
    return [torch.load(path / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(distributed, case):
    """Losses, gradients, weights and running statistics of stock PyTorch with the whole batch."""
    expected = two_steps(stock_of(CASES[case][0]()))
    for rank in range(WORLD):
        found = distributed[rank][case]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            mine = found[name] / WORLD if name.startswith("loss") else found[name]
            torch.testing.assert_close(mine, value, rtol=1e-7, atol=1e-9, msg=f"rank {rank}, {name}")


# ---- copies and averages ----


@each_model
def test_saved_and_resumed(make):
    """A run that was saved whole, model and optimizer, goes on to the same numbers."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model), optimizer.step()
    file = io.BytesIO()
    torch.save((model, optimizer.state_dict()), file)
    file.seek(0)
    loaded, state = torch.load(file, weights_only=False)
    resumed = torch.optim.SGD(loaded.parameters(), 0.1, momentum=0.9)
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (loaded, resumed)):
        o.zero_grad(), step(m), o.step()
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@each_model
def test_average_of_the_weights(make):
    """torch.optim.swa_utils: the average follows, and its statistics are measured anew."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    results = []
    for model in (make(), stock_of(make())):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad(), step(model), optimizer.step()
            ema.update_parameters(model)
        update_bn([X[:4], X[4:]], ema)
        results.append((ema.eval()(X), ema.state_dict()))
    assert_equal(*results)


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_scaler(make, dtype):
    """Two scaled steps under autocast end as near to fp64 as stock's."""

    def train(model, autocast):
        x = X.to(next(model.parameters()).dtype)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cpu", 2.0**8)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x), LABELS)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer), scaler.update()
        assert scaler.get_scale() == 2.0**8  # nothing overflowed
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    start = make().float()
    exact = train(stock_of(start).double(), False)
    stock = train(stock_of(start), True)
    assert (train(start, True) - exact).norm() <= 2 * (stock - exact).norm()


@each_model
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_lie_as_their_weights(make, layout):
    """As in stock; where they do not, DDP warns and the optimisers of a GPU go one by one."""
    model = make().to(memory_format=layout)
    step(model, X.contiguous(memory_format=layout))
    assert not [name for name, p in model.named_parameters() if p.grad.stride() != p.stride()]


@each_model
def test_gradient_checkpointing(make):
    """Segments run again in the backward give the gradients of the whole."""
    from torch.utils.checkpoint import checkpoint

    model = make()
    expected = stock_of(model)
    step(expected)

    def run(x):
        if isinstance(model, mnops.MobileNet):
            x = checkpoint(model.forward_features, x, use_reentrant=False)
            return model.forward_head(x)
        return torch.utils.checkpoint.checkpoint_sequential(model, 3, x, use_reentrant=False)

    step(run)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


@each_model
def test_accumulated_and_clipped(make):
    """Two halves of a batch with norms in eval, clipped: the whole batch's gradient."""
    model = make().eval()
    expected = stock_of(model)
    step(expected)
    for half in (slice(0, 4), slice(4, 8)):
        (step_half := nn.functional.cross_entropy(model(X[half]), LABELS[half]) / 2).backward()
        assert step_half.requires_grad
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, expected)]
    assert_equal(*norms)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


# ---- torch.func ----


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model):
    """Of the parameters; the running statistics of training go to copies."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def loss(parameters, x, labels):
        copies = {name: b.clone() for name, b in buffers.items()} if model.training else buffers
        logits = torch.func.functional_call(model, (parameters, copies), (x,))
        return nn.functional.cross_entropy(logits, labels)

    return loss


@each_model
def test_functional_call_and_grad(make):
    model = make()
    stock = stock_of(model)
    results = [torch.func.grad_and_value(loss_of(m))(parameters_of(m), X, LABELS) for m in (model, stock)]
    assert_equal(*results)


@each_model
def test_per_sample_gradients(make):
    """vmap over the images, norms in eval."""
    model = make().eval()
    per_sample = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(None, 0, 0))
    found = per_sample(parameters_of(model), X[:3, None], LABELS[:3, None])
    stock = stock_of(model)
    for i in range(3):
        expected = torch.func.grad(loss_of(stock))(parameters_of(stock), X[i : i + 1], LABELS[i : i + 1])
        assert_equal({name: g[i] for name, g in found.items()}, expected)


@each_model
def test_vmap_over_models(make):
    """An ensemble: parameters and buffers stacked, one call."""
    models = [make().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    state = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (X[:2],))

    found = torch.func.vmap(call)(*state)
    assert_equal(found, torch.stack([stock_of(m)(X[:2]) for m in models]))


@each_model
def test_jacobian_and_forward_mode(make):
    model = make().eval()
    stock = stock_of(model)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_equal(transform(model)(X[:1, :, :8, :8]), transform(stock)(X[:1, :, :8, :8]))


# ---- gradients that somebody watches ----


@each_model
@pytest.mark.parametrize("watch", ["register_hook", "retain_grad", "multi_grad_hook"])
def test_gradients_of_activations(make, watch):
    """Hooks on the outputs of every block see what they see in stock, as Grad-CAM wants."""
    results = []
    for model in (make(), stock_of(make())):
        seen, outputs = [], []

        def look(module, args, output, seen=seen, outputs=outputs):
            outputs.append(output)
            if watch == "register_hook":
                output.register_hook(lambda g: seen.append(g.clone()))
            elif watch == "retain_grad":
                output.retain_grad()
            else:
                torch.autograd.graph.register_multi_grad_hook([output], lambda gs: seen.extend(gs))

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Hardswish)):
                module.register_forward_hook(look)
        step(model)
        results.append([seen, [o.grad for o in outputs] if watch == "retain_grad" else []])
    if isinstance(make(), mnops.MobileNet):
        assert len(results[0][0]) == len(results[1][0])
    assert_equal(*results)
