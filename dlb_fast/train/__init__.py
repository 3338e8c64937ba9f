"""The trainer: `config` and `data` describe a run, `models` and `optim` build it, `loop` trains, `checkpoint` saves,
`log` reports, `evaluate` scores, `distributed` adds ranks, `run` joins all of it in a run folder, `compare` compares.
"""
