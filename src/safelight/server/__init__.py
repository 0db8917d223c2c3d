"""`safelight serve`: the engine behind HTTP.

The server (`app`, and the routes in `apis`) writes requests into the database of jobs (`store`)
and answers from it (`hub`); it never imports PyTorch. One worker process (`worker`, kept running
by `supervisor`) claims jobs, draws, and commits pictures. Messages between the two, progress and
previews (`events`), may be lost; jobs and pictures may not.

Its modules, by subject:

- the database: tables, schema, migrations, database, store, claims, roster, shares, people,
  allowances, outbox, expiry
- files: files, quarantine, keep, retention, private, backup, snapshot, recovery
- HTTP: run, app, listening, guard, sites, callers, bodies, limits, connections, disconnects,
  streams, tokens, entrance, keyring, wording, apis
- what the routes ask for: hub, jobs, intake, uploads, costs, names, sizes, served, catalogue,
  events, webhooks, threads, metrics, logs, tracing, enlargements
- pictures of strangers: decoding, decoder, caged, turns
- the worker: settings, process, supervisor, pulse, steps, worker, holder, held, loaded, previews,
  upscaling
- a fleet of workers: fleet, station, wire, crew, on_ray, scaling
"""
