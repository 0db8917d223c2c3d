"""`safelight serve`: the engine behind HTTP.

The server (`app`, and the routes of `api`, `openai` and `sdapi`) takes requests, writes them into
the database of jobs (`store`) and answers from it; it never imports PyTorch. One worker process
(`worker`) claims jobs, draws, and commits pictures. What they tell each other on the way, progress
and previews, may be lost; jobs and pictures may not.
"""
