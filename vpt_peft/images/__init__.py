"""Images on their way into a model: files, image processors, and position embeddings.

Nothing is imported here: processes that check files (:mod:`.files`) need no torch.
"""
