"""`python -m bigmodel_fast`: the same as the command bigmodel-fast."""

import sys

from .cli import main

sys.exit(main())
