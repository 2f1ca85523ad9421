"""Other tools that make and run quantized language models, each behind the same few functions.

An adapter is a module with two functions. Both run in a process of their own, in the environment that the tool is
installed in, where this project's libraries are not:

    convert(checkpoint, folder, **options)          writes into `folder` what the tool runs; the checkpoint is float32
    load(folder, checkpoint, threads, **options)    a runner with prefill and decode (see `running`)

It imports its tool inside the functions. `candidates` lists what is compared, `converting` and `serving` are the
processes, `measuring` lets the candidates take turns, `gathering` makes figures of what they left, `targets` judges
them and `page` writes them down.
"""
