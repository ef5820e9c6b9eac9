"""Serves a page that tells which training images a picture owes most to: a prompt or an image in, pictures out.

python -m launch.serve --flagfile=configs/search_openmoji.cfg

Then open http://localhost:8000. Needs pip install -e '.[serve]'.
"""

import logging
from collections.abc import Sequence

from absl import app, flags

from attrib_jax.core.checks import expand_path
from attrib_jax.jobs.context import Run
from attrib_jax.jobs.encode import image_resolution
from attrib_jax.jobs.query import Query
from attrib_jax.methods.unlearn import UnlearnConfig
from attrib_jax.retrieval.index import open_index
from attrib_jax.serving.address import listen
from attrib_jax.storage.stage_root import StageRoot
from attrib_jax.storage.stages import lock
from launch import common
from launch.flags import define_flags, read_config

_INDEX = flags.DEFINE_string("index", None, "Folder of the index; <workdir>/index if not given.")
_TOWER = flags.DEFINE_string("tower", None, "The student's tower, if it is not where it was when the index was made.")
_HOST = flags.DEFINE_string(
    "host", "localhost", "Address to listen at. Anybody who reaches it can use the device: there are no passwords."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_TOP_K = flags.DEFINE_integer("top_k", 24, "Images of an answer.", lower_bound=1, upper_bound=200)
define_flags(Query, UnlearnConfig, skip=["method", "seed", "region", "region_mask"])

_LOCAL = ("localhost", "127.0.0.1", "::1")


def main(argv: Sequence[str]) -> None:
    with common.command(argv):
        common.require(model=common.MODEL.value, workdir=common.workdir())
        try:
            import uvicorn

            from attrib_jax.serving.app import make_app
        except ImportError as error:
            raise ValueError(
                f"the page needs {error.name}, which is not installed: pip install -e '.[serve]'"
            ) from error
        from attrib_jax.serving.engine import Engine
        from attrib_jax.serving.worker import Worker

        # Before the model is read.
        listening = listen(_HOST.value, _PORT.value)
        index = open_index(expand_path(_INDEX.value or f"{common.workdir()}/index"), _TOWER.value)
        exact, sampler = read_config(UnlearnConfig, method="unlearn"), read_config(Query, prompt="")
        pipeline = common.load_model()
        dataset = common.load_dataset(image_resolution(pipeline))
        with lock(common.workdir()):
            run = Run(pipeline, dataset, StageRoot(common.workdir(), common.shipped_stages()), common.encode_config())
            engine = Engine(run, index, exact, sampler, common.MODEL.value, common.model_credit(), _TOP_K.value)
            worker = Worker()
            worker.submit(engine.warm_up)
            hosts = ["localhost", "127.0.0.1", "[::1]"] if _HOST.value in _LOCAL else ["*"]
            server = uvicorn.Server(
                uvicorn.Config(make_app(engine, worker, hosts), log_level=logging.WARNING, timeout_graceful_shutdown=5)
            )
            print(f"http://{_HOST.value}:{listening.getsockname()[1]} (stop with Ctrl-C)", flush=True)
            server.run(sockets=[listening])


if __name__ == "__main__":
    common.adopt_shared_flags()
    app.run(main, argv=common.arguments())
