set -euo pipefail
python -m pip install --editable '.[mini,dev]'
