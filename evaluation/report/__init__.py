"""What the results say.

`results` reads the database once, `comparison` judges, `sections` says what is shown in neutral blocks, `html`,
`markdown` and `terminal` lay those out, and `data` writes JSON, CSV and what DVC shows.
"""
