"""Files of many requests: rows in, pictures and one index out.

`rows` reads the file, `check` makes a request of each row, `worklist` keeps them, `drawing` draws
them with the engine, `on_ray` with many of them, and `output` writes what comes out. `run` puts
these together. PyTorch is imported by `drawing` alone.
"""
