"""The trainer: `config`, `flags` and `data` describe a run, `models`, `weights` and `optim` build it, `loop` trains,
`checkpoint` saves, `log` reports, `evaluate` scores, `predict` names classes, `distributed` adds ranks, `run` joins all
of it in a run folder, `compare` compares.
"""
