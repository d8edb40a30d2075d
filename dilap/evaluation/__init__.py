"""How good a model is: a checkpoint in torch, or an artifact through its own runtime, on the same text and tasks.

An exported file may answer differently from the torch model that it was made of, so the file itself can be scored:

    from dilap.evaluation.subject import open_subject
    from dilap.evaluation.text_quality import compare

    found = compare(open_subject("runs/mine"), open_subject("smollm2-135m"), text="python-docs")
    print(found.kl, found.perplexity)
"""
