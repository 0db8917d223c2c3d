"""Files of many requests: rows in, pictures and one index out.

`rows` reads the file, `check` makes a request of each row, `worklist` stores them, `drawing` draws
them with an engine, `on_ray` with one engine in each of many workers, and `output` writes the
results. `run` puts these together. Only `drawing` imports PyTorch.
"""
