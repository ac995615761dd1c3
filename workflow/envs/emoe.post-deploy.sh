set -euo pipefail
python -m pip install --editable '.[suite,mini,dev]' --constraint constraints.txt
