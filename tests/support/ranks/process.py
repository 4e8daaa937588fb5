"""One rank's process: `process.py SCENARIO FAMILY SPLIT JSON`. It prints what it saw as lines of JSON."""

import faulthandler
import json
import os
import sys

import oracle
from matrix import shapes

from mlx_hybridcache import Group, GroupError, HybridPromptCache
from mlx_hybridcache.group import group as grouped
from mlx_hybridcache.group.load import split
from ranks import scenarios
from ranks.started import MOST_SECONDS


def say(**what):
    """At once and on a line of its own: MLX writes its lines in pieces, and on the same pipe."""
    os.write(sys.stdout.fileno(), f"\n{json.dumps(what)}\n".encode())


def main(scenario, family, how, options):
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    grouped.LOOKS = options.pop("looks", grouped.LOOKS)
    group = Group.form()
    model = shapes.build(family)
    split(group, model, pipeline=how == "pipeline")
    settings = scenarios.SETTINGS | options.pop("settings", {})
    cache = HybridPromptCache(model, oracle.word_tokenizer(), group=group, **settings)
    scenarios.break_rank(options.pop("broken", None), group.rank, cache)
    weights = cache.info.row_bytes, cache.info.checkpoint_bytes
    say(ready=os.getpid(), weights=weights, layers=cache.info.layers)
    try:
        if group.rank:
            cache.follow()
        else:
            getattr(scenarios, scenario)(cache, say, **options)
        cache.close()
    except GroupError as error:
        say(failed=str(error), alive=cache.is_alive)
        cache.close()
        os._exit(3)  # the worker may be in a call that never returns


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
