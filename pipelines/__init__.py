"""One thin module per DVC stage; the only place that reads params.yaml and knows the stages' paths."""
