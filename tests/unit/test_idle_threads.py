"""Idle OpenMP threads sleep: the setting is made before torch is imported, whichever way a process begins."""

import os
import subprocess
import sys

import pytest

# Says, when torch is first imported, what the variable holds by then.
WATCH = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch with", os.environ.get("OMP_WAIT_POLICY"))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
"""
ENTRIES = {
    "run": "from qlora_neft import run",
    "trainer": "from qlora_neft import QLoRANeftTrainer",
    "command line": "from qlora_neft.cli import main; main(['noise', 'demo'])",
    "module": "import runpy; sys.argv[1:] = ['noise', 'demo']; runpy.run_module('qlora_neft', run_name='__main__')",
    "notebook": "from qlora_neft import output_of; output_of('noise', 'demo')",
    "sweep's runs": "import qlora_neft.compare.sweep",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_is_set_before_torch_is_imported(entry):
    assert said_by(WATCH + ENTRIES[entry]) == "torch with PASSIVE\n"


def test_the_users_own_value_is_kept():
    assert said_by(WATCH + ENTRIES["run"], OMP_WAIT_POLICY="ACTIVE") == "torch with ACTIVE\n"


def test_processes_started_later_inherit_it():
    code = "import subprocess, sys, qlora_neft\n"
    code += "subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"OMP_WAIT_POLICY\"])'])"
    assert said_by(code) == "PASSIVE\n"


def said_by(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
