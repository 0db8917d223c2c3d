"""`safelight serve`: the engine behind HTTP.

The server (`app`, and the routes in `apis`) writes requests into the database of jobs (`store`)
and answers from it (`hub`); it never imports PyTorch. One worker process (`worker`, kept running
by `supervisor`) claims jobs, draws, and commits pictures. Messages between the two, progress and
previews (`events`), may be lost; jobs and pictures may not.
"""
