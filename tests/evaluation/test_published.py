"""The published loss is shown where it compares, and nowhere else."""

from gpt2repro.evaluation.published import published_loss


def test_the_published_baseline_needs_the_dataset_and_the_tokenizer():
    fineweb = "HuggingFaceFW/fineweb-edu"
    assert published_loss(fineweb, "openai-community/gpt2")[1] == 3.2924
    assert published_loss(fineweb, "my/tokenizer") is None
    assert published_loss("my/dataset", "openai-community/gpt2") is None
