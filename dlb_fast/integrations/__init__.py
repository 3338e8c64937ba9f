"""Training frameworks: what each needs beyond our criterion and our loaders. Nothing of ours imports this room.

One module per framework, which is imported when the module is: `lightning`, `accelerate`, `hf` (Trainer), `timm`,
`composer`. `state` is what they share.
"""
