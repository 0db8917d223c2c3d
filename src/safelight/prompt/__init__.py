"""From the words of a prompt to tokens.

`reading` says what a prompt is in any dialect; `a1111`, `schedule`, `comfy` and `compel` read
theirs; `chunks` turns a reading into token ids, and `states` those into what a network reads.
"""
