"""From the words of a prompt to tokens.

`reading` says what a prompt is in any dialect; `dialects` reads one, with `a1111`, `schedule`,
`comfy` and `compel`; `chunks` turns a reading into token ids, and `states` those into what a
network reads.
"""
