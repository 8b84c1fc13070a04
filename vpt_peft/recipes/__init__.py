"""Recipes: from a folder of images to an adapter and its predictions, as the command ``vpt-peft``.

``command`` is the command line, ``commands`` has one recipe for each subcommand, ``data`` reads images, ``training``
fine-tunes by one method, and ``report`` measures and draws. They need ``pip install 'vpt-peft[train]'``.
"""
