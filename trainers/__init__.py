"""One shared training path (`trainers.common`); each arm's module shows only what differs.

To add an arm: write a module with an `ARM` and name it here.
"""

ARMS: dict[str, str] = {"baseline_lora": "trainers.baseline_lora"}
