"""Write the table of docs/settings.md anew from the fields of `Request`.

python docs/settings.py
"""

from pathlib import Path

from safelight.request import Request
from safelight.settings_docs import markdown

PAGE = Path(__file__).with_name("settings.md")


def with_table(page: str) -> str:
    """Return the page with the table that the code has now."""
    first = page.index("| setting | option |")
    last = page.index("\n\n", first)
    return page[:first] + markdown(Request).rstrip("\n") + page[last:]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
