"""What is measured of a model: answers, hidden states, the separation index, drift, speed."""
