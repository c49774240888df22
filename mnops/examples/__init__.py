"""The applications of arXiv:1704.04861, each one command: `python -m mnops.examples.NAME --data DIR ...`.

detection, fine_grained, geolocation, face_attributes, face_embeddings. Each reads the format of the data set
that the paper or its successors use, trains, writes what it learnt, a table and an index.html with pictures
under --out, and prints the figure that the paper gives. `common` is what they share.
"""
