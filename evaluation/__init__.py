"""Tasks, inference backends, scoring, statistics and the comparison of all arms."""

import db as db  # which says what to do where there is no environment
