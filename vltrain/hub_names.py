"""What a repository on the Hugging Face hub is called, with or without a revision."""

import re

HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
