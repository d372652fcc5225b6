"""The report as one HTML file: `write_page` reads the database and draws everything that was measured.

`blocks` is what sections are made of, `charts` the pictures, `words` the sentences about arms; `data` and `samples`
read the database; `verdict`, `intervals`, `training`, `quality`, `serving`, `tasks` and `provenance` say what is shown;
`page` puts it into `template.html.j2`.
"""

from evaluation.page.page import render, write_page

__all__ = ["render", "write_page"]
