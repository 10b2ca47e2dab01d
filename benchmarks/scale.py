"""What opening a dataset of FineWeb-Edu's size costs, against a fake Hub on loopback.

    python benchmarks/scale.py --output benchmarks/results/scale.json

One real parquet file of 580 tiny row groups and a footer of about 2 MB is served under as many
names as are asked for, by a process of its own. Eight processes open it at once, each for itself,
and take the rows of a step, cold and then with the table of units that the cold start kept. Then
one does so alone, as rank 0 of 256. Resident memory is over that after imports.
"""

import io
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pyarrow as pa
import pyarrow.parquet as pq
from fake_hub import FakeHub, Repository
from tiny_corpus import ByteEncoder, documents

from gpt2repro.commands.parser import OneLineParser
from gpt2repro.system.command_line import run

NAME, COMMIT = "benchmark/large", "1" * 40
ROW_GROUPS, DOCUMENTS_PER_GROUP, OTHER_COLUMNS = 580, 4, 7
NUM_PROCESSES, NUM_LANES = 8, 64
ONE_OF_MANY = {"num_lanes": 1024, "world_size": 256}
IMPORTED = ["gpt2repro.data.opening", "gpt2repro.data.rows.stream", "datasets.load", "torch"]
PARQUET = r"/resolve/.*\.parquet$"


def large_file() -> tuple[bytes, int]:
    """The file and the length of its footer, which is mostly statistics."""
    texts = documents(ROW_GROUPS * DOCUMENTS_PER_GROUP, max_words=200)
    rng = random.Random(0)
    columns = {
        f"column_{index}": [rng.randbytes(80).hex() for _ in texts]
        for index in range(OTHER_COLUMNS)
    }
    buffer = io.BytesIO()
    rows = pa.table({"text": texts} | columns)
    pq.write_table(rows, buffer, row_group_size=DOCUMENTS_PER_GROUP, use_dictionary=False)
    content = buffer.getvalue()
    return content, int.from_bytes(content[-8:-4], "little") + 8


def serve(pipe: Connection) -> None:
    """A Hub in this process: a number of files makes it have as many, None asks what it served."""
    content, footer_bytes = large_file()
    with FakeHub() as hub:
        pipe.send((hub.env, len(content), footer_bytes))
        while (num_files := pipe.recv()) != 0:
            if num_files is None:
                reads = hub.requests(PARQUET)
                footers = [read for read in reads if read.num_bytes >= 2**16]
                pipe.send((len(footers), sum(read.num_bytes for read in footers), len(hub.log)))
            else:
                files = {f"data/{index:05d}.parquet": content for index in range(num_files)}
                repository = Repository("datasets", NAME, {COMMIT: files}, {"main": COMMIT})
                hub.repositories["datasets", NAME] = repository
            hub.log.clear()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def first_rows(place: dict[str, int], cache: str, together: Any, results: Any) -> None:
    """One process of a launch, from its imports to the rows of its first step."""
    from gpt2repro.data.opening import open_corpus
    from gpt2repro.data.rows.mixture import Source
    from gpt2repro.data.rows.order import LaneState, Position
    from gpt2repro.data.rows.stream import TokenStream

    os.environ["XDG_CACHE_HOME"] = cache
    imported = resident_mb()
    together.wait()
    began, cpu = time.perf_counter(), time.process_time()
    corpus = open_corpus(NAME)
    opened = time.perf_counter() - began, resident_mb() - imported
    options = {"sequence_length": 1024, "seed": 1, "rows_per_step": place["num_lanes"]}
    stream = TokenStream([Source(corpus, 1)], ByteEncoder(), **options, **place)
    next(stream)
    found = {
        "units": corpus.num_units,
        "seconds_to_open": opened[0],
        "seconds_to_first_rows": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "mb_opened": opened[1],
        "mb_first_rows": resident_mb() - imported,
        "mb_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - imported,
    }
    stream.close()
    late = Position(9, stream.plans[0].num_pieces(0) - 1, 999, 1023)  # as long as they get
    lanes = dict.fromkeys(range(place["num_lanes"]), LaneState(10**6, (late,)))
    found["state_bytes"] = len(json.dumps(stream.state_dict(lanes)))
    results.put(found)


def launched(places: list[dict[str, int]], cache: str, hub: Connection) -> dict[str, float]:
    """The largest of what the processes found, and what the Hub served them in all."""
    context = multiprocessing.get_context("forkserver")  # which has imported before it forks
    context.set_forkserver_preload(IMPORTED)
    together, results = context.Barrier(len(places)), context.Queue()
    processes = [
        context.Process(target=first_rows, args=(place, cache, together, results), daemon=True)
        for place in places
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=900) for _ in processes]
    for process in processes:
        process.join()
    hub.send(None)
    footers, num_bytes, requests = hub.recv()
    largest = {key: round(max(each[key] for each in found), 2) for key in found[0]}
    return largest | {"footer_reads": footers, "footer_bytes": num_bytes, "requests": requests}


def measure(num_files: int, hub: Connection) -> dict[str, Any]:
    ranks = [
        {"num_lanes": NUM_LANES, "rank": rank, "world_size": NUM_PROCESSES}
        for rank in range(NUM_PROCESSES)
    ]
    hub.send(num_files)
    with tempfile.TemporaryDirectory() as cache:
        found = {}
        for name, places in (
            ("cold", ranks),
            ("warm", ranks),
            ("one_of_many", [ONE_OF_MANY | {"rank": 0}]),
        ):
            found[name] = launched(places, cache, hub)
    return found


def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="benchmarks/scale.py", description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, nargs="+", default=[1, 100, 2400])
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args(argv)
    from pairing import circumstances, table, write_json  # torch's, which the processes share

    around = circumstances(vars(arguments))
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    environment, file_bytes, footer_bytes = here.recv()
    os.environ.update(environment)  # of the processes to come
    try:
        found = {str(num_files): measure(num_files, here) for num_files in arguments.files}
    finally:
        here.send(0)
        server.join()
    lines = [
        [num_files, name, *(f"{each[key]:,}" for key in each)]
        for num_files, launches in found.items()
        for name, each in launches.items()
    ]
    header = ["files", "start", *next(iter(found.values()))["cold"]]
    print(table(header, lines))
    shape = {"file_bytes": file_bytes, "footer_bytes": footer_bytes, "row_groups": ROW_GROUPS}
    shape |= {"processes": NUM_PROCESSES, "num_lanes": NUM_LANES, "one_of_many": ONE_OF_MANY}
    write_json(arguments.output, {"benchmark": "scale", **around, **shape, "files": found})
    return 0


if __name__ == "__main__":
    sys.exit(run("benchmarks/scale.py", main, sys.argv[1:]))
