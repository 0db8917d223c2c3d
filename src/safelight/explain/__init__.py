"""How one picture came to be: `watch` it being drawn, then make the `page` that shows it.

    from safelight.explain.page import page
    from safelight.explain.watch import watch

    story = watch(model, Request(prompt="a cat above a pizza", seed=1))
    Path("explain.html").write_text(page(story), encoding="utf-8")

Nothing is imported here, so that the texts can be read without PyTorch.
"""
