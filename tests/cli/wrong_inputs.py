"""All commands by all wrong inputs, as data: one row for what was typed, the exit status, and words of the one line.

A new way to go wrong is one more row. Every row is tried through the real command; input_row.py says what a row holds.
"""

from __future__ import annotations

from input_row import DONE, FAILED, USER, Row, evaluate, export, generate, report, train
from wrong_texts import CHATS, SHARED, STREAMS

EVERY_COMMAND = [
    Row(command, typed, USER, words)
    for command in ("train", "eval", "export", "generate", "inspect", "report")
    for typed, words in (
        (["--experiment", "tiny"], ["--experiment: there is no such option", "key=value: experiment=tiny"]),
        (["--experiment=tiny"], ["--experiment=tiny: there is no such option", "experiment=tiny"]),
        (["--cfg", "foo"], ["--cfg", "invalid choice: 'foo'"]),
        (["-V"], ["-V: there is no such option"]),
        (["seed", "3"], ["seed: settings are given as key=value"]),
        (["=5"], ["=5"]),
        (["xyzzy.a=1"], ["xyzzy.a: there is no such key"]),
        (["plugins=[no_such_module]"], ["plugins=no_such_module: cannot be imported"]),
    )
] + [
    Row(command, ["--version"], DONE, [f"usllm-{command} 0."])
    for command in ("train", "eval", "export", "generate", "inspect", "report")
]

COMPOSITION = [
    train("sketch=minhash", "sketch=minhash: there is no such option", "absmaxmin"),
    train("experiment=demoo", "did you mean experiment=demo?"),
    train("model=nope", "model=nope: there is no such option", "a folder, a .gguf file"),
    train("model=", "model=: needs a value; choose one of folder"),
    train("model=null", "model=null: needs the name of an option"),
    train("data=null", "data=null: needs the name of an option"),
    train("callbacks=3", "callbacks=3: needs the name of an option"),
    train("stages=[1]", "stages=[1]: needs the name of an option"),
    train("stages=[default,foo]", "stages=foo: there is no such option", "reconstruct"),
    train("sketch.row=1", "sketch.row: there is no such key; did you mean sketch.rows?"),
    train("data.validation.kind=text", "data.validation is null; pass ++data.validation.kind"),
    train("sketch.rows=1,2", "sketch.rows=1,2: several values are a sweep: add -m"),
    train("seed=interval(1,2)", "seed=interval(1,2): is a range of a sweep: add -m"),
    train("name=${nope}", "name=${nope}: Interpolation key 'nope' not found"),
    train("seed=${oc.env:NO_SUCH_NAME}", "NO_SUCH_NAME"),
    train("trainer.strategy=${x}", "trainer.strategy: does not resolve: Interpolation key 'x' not found"),
    train("study=abc", "study=abc: must be a group of settings"),
    train("sketch.rows=[1", "sketch.rows=[1: must be a whole number"),
    train("sketch.rows=foo(1)", "sketch.rows=foo(1): must be a whole number"),
    train("sketch.rows=", "sketch.rows=: must be a whole number"),
    train("resume=maybe", "resume=maybe: must be true or false"),
    train("data.train.separator=null", "data.train.separator=null: must be a text"),
    train("+sketch.rows=3", "An item is already at 'sketch.rows'"),
    train("~sketch", "sketch: needs a value"),
    train(["hydra/launcher=ray_local", "-m"], "hydra/launcher=ray_local: needs a plug-in", "pip install 'usllm[ray]'"),
    train(["hydra/sweeper=foo", "-m"], "hydra/sweeper=foo: there is no such option", "bayes"),
    train(["model=DENSE,random", "-m"], "model=DENSE,random: a sweep goes over options"),
    train(["sketch.rows=0", "-m"], "sketch.rows=0 must be a whole number"),
    Row("train", ["seed=1", "-m", "name=x"], USER, ["name=x: options such as -m stand before the first"]),
]

VALUES = [
    train("trainer.val_check_interval=0", "trainer.val_check_interval=0: must be a share"),
    train("trainer.val_check_interval=1000", "the run has 2 micro batches, so it would never validate"),
    train("optimizer.lr=1e38", "optimizer.lr=1e+38: must be above 0 and at most"),
    train("optimizer.lr=inf", "optimizer.lr=inf: must be above 0 and at most"),
    train("optimizer.weight_decay=1e300", "optimizer.weight_decay=1e+300: must be 0 or more"),
    train("sketch.bits_per_weight=inf", "sketch.bits_per_weight=inf must be a finite number"),
    train("sketch.bits_per_weight=nan", "sketch.bits_per_weight=nan must be a finite number"),
    train("seed=-1", "seed=-1: must be at least 0"),
    train("seed=99999999999999999999999", "seed=99999999999999999999999: must fit into 64 bits"),
    train("trainer.max_steps=99999999999999999999999", "trainer.max_steps=99999999999999999999999"),
    train(["trainer.max_steps=null", "trainer.epochs=1e300"], "trainer.epochs", "must be below 2147483648 steps"),
    train("trainer.max_steps=many", "trainer.max_steps=many: must be a whole number, such as 1000"),
    train(["trainer.max_steps=null", "trainer.epochs=one"], "trainer.epochs=one: must be a number, such as 0.5"),
    train("trainer.tokens=100", "trainer.max_steps=2, trainer.epochs=None and trainer.tokens=100: set exactly one"),
    train(["trainer.epochs=1", "trainer.tokens=9", "trainer.max_steps=null"], "trainer.tokens=9: set exactly one"),
    train(["trainer.max_steps=null", "trainer.tokens=-5"], "trainer.tokens=-5: must be a whole number of at least 1"),
    train(["trainer.max_steps=null", "trainer.tokens=1e9"], "trainer.tokens=1000000000.0: must be a whole number"),
    train(["trainer.max_steps=null", f"trainer.tokens={10**18}"], "trainer.tokens", "must be below 2147483648 steps"),
    train("trainer.accumulate_grad_batches=99999999999", "must be a whole number of at least 1"),
    train("data.batch_size=9223372036854775807", "data.batch_size=9223372036854775807: must be at least 1 and below"),
    train("data.num_workers=100000", "data.num_workers=100000: must be at least 0 and below 1025"),
    train("callbacks.preemption.exit_code=abc", "callbacks.preemption.exit_code=abc: must be a whole number"),
    train("callbacks.sketch_health.perplexity_max=abc", "callbacks.sketch_health.perplexity_max=abc: must be a number"),
    train("stages.calibrate.sequences=abc", "stages.calibrate.sequences=abc: must be a whole number"),
    train("+callbacks.x._target_=no.Such", "callbacks.x._target_=no.Such: cannot be found"),
    train("data.train.document_start=[", "data.train.document_start='[' is not a regular expression"),
    evaluate("seed=-1", "seed=-1: must be at least 0"),
    evaluate("seed=1", "seed=1: no task is run"),
    evaluate("evaluation.windows=32", "evaluation.windows=32: must be a list, as in [1,2]"),
    evaluate("evaluation.batch_size=99999999999999999999999", "must fit into 64 bits"),
    generate("seed=-1", "seed=-1: must be at least 0 and below 4294967296"),
    generate("seed=4294967296", "seed=4294967296: must be at least 0 and below"),
    generate("seed=1", "seed=1: nothing is drawn at temperature=0"),
    generate("top_p=0.5", "top_p=0.5: nothing is drawn at temperature=0"),
    generate("temperature=1e-320", "temperature=1e-320: must be 0", "at least 0.001"),
    generate("temperature=nan", "temperature=nan: must be 0"),
    generate("keep_decoded=1MB", "keep_decoded: is layout=decoded layout_memory=… now"),
    generate("layout=fast", "layout=fast: unknown; choose one of auto, compact, expanded, decoded"),
    generate(["layout=compact", "layout_memory=1MB"], "layout_memory=1MB: nothing is held with layout=compact"),
    generate("layout_memory=much", "layout_memory=much: must be a size such as 200MB"),
    generate("max_new_tokens=3000", "more than the model's 2048 positions"),
    export("seed=1", "seed=1: ckpt=RUN decides that"),
    export("max_shard_size=0", "max_shard_size=0: must be a size"),
    export("rest.embeddings=3", "rest.embeddings=3: must be 16"),
    export("form=onnx", "form=onnx: unknown; choose one of packed, dense, gguf"),
    export("gguf.type=Q8_0", "gguf.type=Q8_0: has no effect with form=packed; leave it out, or pass form=gguf"),
    export("dense.dtype=float32", "dense.dtype=float32: has no effect with form=packed", "pass form=dense"),
    export(["form=dense", "rest.dtype=float32"], "rest.dtype=float32: has no effect with form=dense", "form=packed"),
    export(["form=dense", "dense.dtype=int8"], "dense.dtype=int8: unknown; choose one of float32"),
    export(["form=gguf", "out=HERE/x.gguf", "max_shard_size=1GB"], "max_shard_size=1GB: has no effect with form=gguf"),
    export(["form=gguf", "out=HERE/x.gguf", "gguf.type=Q2_K"], "gguf.type=Q2_K: unknown; choose one of F32"),
    export(["form=gguf", "out=HERE/x.gguf", "gguf.embeddings=6"], "gguf.embeddings=6: unknown; choose one of F32"),
    export(
        ["form=gguf", "out=HERE/x.gguf", "measure=true"], "measure=true: form=gguf has no card", "usllm-eval model="
    ),
    export(["form=gguf", "out=HERE/x.gguf"], "form=gguf: the tokenizer has no merges", "pass form=dense"),
    report("reference.perplexity=nan", "reference.perplexity=nan: must be a positive number"),
    report("title=[a,b]", "title"),
    report("reference=x", "reference=x: must be a group of settings"),
]

PLACES = [
    # Two faults: what Lightning refuses is said before the text, which is too short, is read.
    train(["trainer.accelerator=foo", "data.train.path=FILE"], "trainer: ", "`accelerator='foo'`", "names are: auto"),
    train(["trainer.devices=foo", "data.train.path=FILE"], "trainer: `devices`"),
    train("data.train.path=HERE/nope", "data.train.path=HERE/nope: no such file"),
    train("data.train.path=~/no such,file=[.txt", "data.train.path=~/no such,file=[.txt: no such file"),
    train("output_root=FILE", "run_dir: cannot be made", "choose another run_dir or output_root"),
    train("run_dir=FILE", "run_dir: cannot be made"),
    train("output_root=/proc/no", "run_dir: cannot be made"),
    train("data.train.path=~x/nobody", "data.train.path=~x/nobody: no such file"),
    Row("inspect", ["model=~x"], USER, ["model=~x: no such folder"]),
    train("data.cache_dir=FILE", "data.cache_dir=FILE: FILE is a file; choose another folder"),
    train("model=/no/such/folder", "model.name=/no/such/folder: no such folder"),
    train("model=no/such/folder", "model.name=no/such/folder: no such folder"),
    train("model=no.gguf", "model.file=no.gguf: no such file"),
    train("model=no/such", "model.name='no/such' is no folder here", status=FAILED),
    train(["data=jsonl", "data.train.path=LINES"], "line 1 holds half of a surrogate pair"),
    train("model=FOREIGN", "data.train holds token", "but the model has 264 tokens"),
    evaluate("run_dir=FILE", "run_dir: cannot be made"),
    evaluate("model=FOREIGN", "holds token", "but the model has 264 tokens"),
    evaluate("data=[]", "data=[]: names no file to measure on"),
    evaluate("data=[LINES]", "line 1 holds half of a surrogate pair"),
    evaluate("data=[HERE/no such,file.txt]", "no such file"),
    Row("eval", ["ckpt="], USER, ["ckpt=: is empty"]),
    Row("eval", ["ckpt=TEXT"], USER, ["checkpoint TEXT cannot be read"]),
    Row("generate", ["prompt=hi"], USER, ["model and ckpt: neither is given"]),
    Row("generate", ["prompt=hi", "model=no/pe"], USER, ["model=no/pe: is no folder here"]),
    Row("generate", ["prompt=hi", "model=DENSE"], USER, ["model=DENSE", "written in the form packed"]),
    Row("generate", ["prompt=hi", "model=FILE"], USER, ["model=FILE: is no folder; give a packed one"]),
    generate("folder=PACKED", "model=… and folder=… are one thing"),
    Row("inspect", [], USER, ["model: needs a value; pass model=…"]),
    Row("inspect", ["model="], USER, ["model=: is empty"]),
    Row("inspect", ["model=DENSE"], USER, ["model=DENSE", "is not that of a packed usllm model"]),
    Row("inspect", ["model=PACKED", "folder=DENSE"], USER, ["model=… and folder=… are one thing"]),
    Row("inspect", ["model=PACKED", "json=FILE/x.json"], USER, ["json=FILE/x.json: FILE is a file"]),
    Row("inspect", ["model=PACKED", "json=HERE"], USER, ["json=HERE: is a folder, not a file"]),
    Row("inspect", ["model=PACKED", "json=/proc/x.json"], FAILED, ["/proc/", "choose another one"]),
    export("out=", "out=: is empty"),
    export("out=FILE/x", "out=FILE/x: FILE cannot be written to"),
    export("out=/proc/x", "/proc/", status=FAILED),
    export("form=gguf", "out=HERE/out: form=gguf writes one file: give it a name that ends in .gguf"),
    export(["form=gguf", "out=HERE"], "out=HERE: form=gguf writes one file"),
    export(["form=gguf", "out=FILE/x.gguf"], "out=FILE/x.gguf: FILE is a file; give the name of a file"),
    export(["form=dense", "out=PACKED", "overwrite=true"], "out=PACKED exists and is not a dense model written by"),
    export(["form=dense", "out=DENSE", "overwrite=true"], "out=DENSE exists and is not a dense model written by"),
    Row(
        "export",
        ["model=PACKED", "out=HERE/x"],
        USER,
        ["model=PACKED: is packed already; pass form=dense or form=gguf"],
    ),
    Row(
        "export",
        ["model=PACKED", "form=dense", "out=HERE/x", "sketch.rows=1"],
        USER,
        ["sketch.rows=1: model=PACKED decides that; leave it out"],
    ),
    Row(
        "export",
        ["model=PACKED", "form=dense", "out=HERE/x", "measure=true"],
        USER,
        ["evaluation.test_sets: none given, so measure=true has nothing to measure beside model=PACKED"],
    ),
    Row(
        "export",
        ["model=PACKED", "form=dense", "out=HERE/x", "measure=true", "evaluation.validation_split=true"],
        USER,
        ["evaluation.validation_split=true: model=PACKED does not bring the text", "evaluation.test_sets: none given"],
    ),
    Row(
        "export",
        ["model=PACKED", "form=dense", "out=HERE/x", "model.patterns=[q_proj]"],
        USER,
        ["model.patterns=[q_proj]: model=PACKED decides that; leave it out"],
    ),
    report("out=FILE/x", "out=FILE/x: FILE is a file"),
    report("out=/proc/x", "/proc/x", status=FAILED),
    report("out=", "out=: is empty"),
    report("reference.evaluation=TEXT", "reference.evaluation=TEXT", "is not a JSON object", "give another file"),
    report("reference.evaluation=HERE", "reference.evaluation=HERE", "cannot be read"),
]

ONE_BLOCK = ["block_by_block=true", "trainer.max_steps=0", "stages=[default,reconstruct]", "model=DENSE"]


def one_block(typed: str | list[str], *words: str, status: int = USER) -> Row:
    return train([*ONE_BLOCK, *(typed if isinstance(typed, list) else [typed])], *words, status=status)


BLOCK_BY_BLOCK = [
    one_block("trainer.max_steps=5", "trainer.max_steps=5: block_by_block=true", "pass trainer.max_steps=0"),
    one_block(["trainer.max_steps=null", "trainer.epochs=1"], "trainer.epochs=1: block_by_block=true"),
    one_block(["trainer.max_steps=null", "trainer.tokens=9"], "trainer.tokens=9: block_by_block=true"),
    one_block("trainer.devices=2", "trainer.devices=2: block_by_block=true", "runs on one device"),
    one_block("trainer.strategy=ddp", "trainer.strategy=ddp: block_by_block=true", "runs on one device"),
    one_block("trainer.accelerator=tpu", "trainer.accelerator=tpu: block_by_block=true", "choose one of cpu"),
    one_block("model=random", "model.kind=random: block_by_block=true", "give a folder"),
    one_block("allocation.layer_budget=sensitivity", "allocation.layer_budget=sensitivity", "equal or importance"),
    one_block("stages=default", "stages: block_by_block=true trains blocks; pass stages=[default,reconstruct]"),
    one_block("+stages.mine._target_=usllm.stages.Mine", "stages=mine: block_by_block=true", "leave it out"),
    one_block("stages.reconstruct.blocks=1", "stages.reconstruct.blocks=1: block_by_block=true", "pass null"),
    one_block("stages.reconstruct.window=3", "stages.reconstruct.window=3: the model has 2 blocks"),
    one_block("callbacks.text_samples.side_by_side=true", "callbacks.text_samples.side_by_side=true: block_by_block"),
    one_block("model=PACKED", "model.name=PACKED is a packed model"),
]

ACCEPTED = [
    train("sketch.bits_per_weight=16", "less than asked: 12 of 12 layers can use no more than", status=DONE),
    train(["sketch=rounding", "sketch.bits_per_weight=3.9"], "the next step of these layers would be", status=DONE),
    train("callbacks=[default,timer]", "Next, try", status=DONE),
    train("++callbacks.checkpoint.dirpath=0", "Next, try", status=DONE),  # a folder may have any name
    export("rest.linears=8", "packed model", status=DONE),
    export("form=dense", "dense model", "bits per weight are gone", status=DONE),
    Row("export", ["model=PACKED", "form=dense", "out=HERE/x"], DONE, ["dense model", "bits per weight are gone"]),
    train(["data.train.path=ODD"], "Next, try", status=DONE),
    train("trainer.strategy=fsdp2", "Next, try", status=DONE),  # on one device
    train("run_dir=${output_root}/two", "/runs/two", status=DONE),
    train(
        ["trainer.max_steps=null", "trainer.tokens=192", "trainer.accumulate_grad_batches=3"],
        *("1 steps x 6 sequences x 32 tokens = 192 tokens for a budget of 192", "1 steps, 192 tokens"),
        status=DONE,
    ),
    train([r"data.train.separator=\n\n", "trainer.max_steps=1"], "Next, try", status=DONE),
    evaluate("data=[ODD]", "Perplexity", status=DONE),
    generate("prompt=~ it's, [a] = ${x} é \\", "", status=DONE),
]

HARNESS = [
    evaluate(
        ["harness.tasks=[choose_a_word]", "harness.include_path=TASKS", "harness.num_fewshot=5"],
        *("harness.num_fewshot=5: a task has too few documents",),
    ),
    evaluate(
        ["harness.tasks=[choose_a_word]", "harness.include_path=TASKS", "harness.limit=1e300"],
        *("harness.limit=1e+300: must be above 0 and below",),
    ),
    Row(
        "eval",
        ["model=FOREIGN", "harness.tasks=[choose_a_word]", "harness.include_path=TASKS", "run_dir=HERE/run"],
        USER,
        ["harness.tasks: a text holds a token"],
    ),
]

ROWS = [*EVERY_COMMAND, *COMPOSITION, *VALUES, *PLACES, *STREAMS, *CHATS, *SHARED, *BLOCK_BY_BLOCK, *ACCEPTED, *HARNESS]
