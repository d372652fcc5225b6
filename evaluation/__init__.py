"""Tasks, inference backends, scoring, statistics and the comparison of all arms."""
