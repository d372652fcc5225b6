"""One thin module per DVC stage; the only place that reads params.yaml and knows the stages' paths."""

import db as db  # which says what to do where there is no environment

STAGES = (
    "check prepare_data prepare_base base_texts tune train probe export evaluate verify quantize measure harness"
).split()
