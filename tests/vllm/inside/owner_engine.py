"""An engine in a process of its own over the pool of an owner: `python owner_engine.py SOCKET MODEL`.

Each line of standard input is a list of prompts as JSON; the answer is a line with tokens and loaded blocks so far.
"""

import json
import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints
    from engine_support import running

    socket, model = sys.argv[1:]
    with running(model, options={"owner": socket}) as engine:
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            tokens = [engine.generate([prompt])[0] for prompt in json.loads(line)]
            engine.settle()
            print(json.dumps([tokens, engine.loaded_blocks]), file=out, flush=True)


if __name__ == "__main__":
    main()
