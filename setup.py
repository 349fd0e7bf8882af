"Packaging: everything that pip needs to know is read from settings.ini, which nbdev shares."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "onnx", "survey", "tensorboard")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="BSD-3-Clause",
    keywords=settings["keywords"],
    python_requires=">=" + settings["min_python"],
    packages=[*find_packages(include=["specpred", "specpred.*"]), "specpred.data"],
    package_dir={"specpred.data": "data"},  # line fits need the stellar library
    package_data={"specpred": ["pretrained/*/*", "examples/*/*"], "specpred.data": ["stellar_library.h5", "README.md", "COPYING", "acknowledgements.txt"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras | {"dev": sum(extras.values(), [])},
    entry_points={"console_scripts": [settings["console_scripts"]], "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"]},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
        "License :: OSI Approved :: BSD License", "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Astronomy"])
