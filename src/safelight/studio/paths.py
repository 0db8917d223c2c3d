"""Where the page and its files are on the server."""

PATH = "/studio"
KEPT_AT = f"{PATH}/kept/"
