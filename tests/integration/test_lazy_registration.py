"""Registration when transformers is imported: in fresh processes, where nothing is loaded yet."""

import subprocess
import sys
import textwrap

import pytest

from moeroute.integration import lazy_registration


def run(program: str) -> str:
    """Run a program in a fresh interpreter, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_registers_when_transformers_comes_later():
    run(
        """
        import sys
        import moeroute

        assert not [name for name in sys.modules if name.partition(".")[0] == "transformers"]
        import importlib
        import importlib.util

        spec = importlib.util.find_spec("transformers.integrations.moe")
        assert spec.origin.endswith("moe.py")
        assert "class ExpertsInterface" in spec.loader.get_source(spec.name)
        from transformers.integrations import moe
        from moeroute.integration.experts_function import moeroute_experts_forward

        assert moe.ALL_EXPERTS_FUNCTIONS["moeroute"] is moeroute_experts_forward
        assert type(moe.__loader__).__name__ == "SourceFileLoader"
        assert moe.__spec__.loader is moe.__loader__

        importlib.reload(moe)
        assert moe.ALL_EXPERTS_FUNCTIONS["moeroute"] is moeroute_experts_forward

        import transformers.integrations.finegrained_fp8 as fp8
        assert "moeroute" in fp8.ALL_FP8_EXPERTS_FUNCTIONS
        """
    )


def test_registers_at_once_when_transformers_is_there():
    run(
        """
        from transformers import MixtralConfig, MixtralForCausalLM
        from transformers.integrations import moe

        assert "moeroute" not in moe.ALL_EXPERTS_FUNCTIONS
        import moeroute

        assert "moeroute" in moe.ALL_EXPERTS_FUNCTIONS
        sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        heads = dict(num_attention_heads=1, num_key_value_heads=1, num_local_experts=2)
        model = MixtralForCausalLM(
            MixtralConfig(**sizes, **heads, experts_implementation="moeroute")
        )
        assert model.get_experts_implementation() == {"": "moeroute"}
        """
    )


def test_installing_again_adds_no_finder():
    def finders():
        return [f for f in sys.meta_path if isinstance(f, lazy_registration.PostImportFinder)]

    assert len(finders()) == 1
    lazy_registration.install()
    assert len(finders()) == 1


def test_other_modules_are_left_alone():
    finder = lazy_registration.PostImportFinder()
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("transformers", None) is None


def test_a_watched_module_that_is_nowhere_is_nowhere():
    finder = lazy_registration.PostImportFinder()
    name = next(iter(lazy_registration.WATCHED))
    assert finder.find_spec(name, ["/nowhere"]) is None


def test_uninstall_takes_the_finder_away():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        lazy_registration.uninstall()
        assert not any(isinstance(f, lazy_registration.PostImportFinder) for f in sys.meta_path)
