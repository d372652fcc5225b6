"""What a run will need, and whether this machine has it; `python -m pipelines.plan` shows it.

Apart from trainers/, so that a change here makes no checkpoint and no trained base out of date.
"""
