#!/usr/bin/env python
"""Say what is in an episode's store, a task's folder or a run. The same as `lerobot-attn inspect`.

python scripts/inspect_attention.py outputs/quickstart/eval
python scripts/inspect_attention.py outputs/quickstart/eval/attention/libero_object_0/episode_00000.zarr
--json
"""

import sys

from lerobot_attn.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "inspect")
    main()
