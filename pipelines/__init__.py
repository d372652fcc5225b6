"""One thin module per DVC stage; only this package reads params.yaml and knows the stages' paths."""

import db as db  # explains what to do if there is no environment

STAGES = (
    "check prepare_data prepare_base base_texts tune train probe export evaluate verify quantize measure harness"
).split()
