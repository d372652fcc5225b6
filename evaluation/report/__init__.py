"""What the results say.

`results` reads the database once, `comparison` compares and judges, `judgement` puts outcomes into words, `sections`
lists the chapters, each of which is a file and returns neutral blocks. `html`, `markdown` and `terminal` lay those out;
`data` writes JSON, CSV and what DVC shows.
"""
