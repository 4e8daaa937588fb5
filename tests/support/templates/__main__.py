"""Learn every template anew and write down what came of it: `PYTHONPATH=.:tests/support python -m templates [SOURCE=FOLDER ...]`.

Without a folder only those that are written here; what is known of published ones stays.
"""

import sys
from pathlib import Path

from templates import page

folders = dict(each.split("=", 1) for each in sys.argv[1:])
known = [each for each in page.load() if each.source] if page.KEPT.exists() else []
new = [each for source, folder in folders.items() for each in page.published(Path(folder), source)]
page.save([*page.structures(), *(new if folders else known)])
