"""Other tools that make and run quantized language models, each behind the same few functions.

An adapter is a module with two functions. Both run in a process of their own, in the environment that the tool is
installed in, where this project's libraries are not:

    convert(checkpoint, folder, **options)          writes into `folder` what the tool runs, from a checkpoint in float32
    load(folder, checkpoint, threads, **options)    a runner, as pipeline.runtime.CausalLMRunner says; batch 1

It imports its tool inside the functions. `candidates` lists what is compared, `converting` and `serving` are the
processes, `measuring` lets the candidates take turns, `targets` judges and `page` writes the result.
"""
