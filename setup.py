"Read every packaging fact from settings.ini, so there is one place to change it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here / "README.md"

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    keywords=cfg["keywords"], license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["dual_ipo", "dual_ipo.*"]), include_package_data=True,
    package_data={"dual_ipo": ["toy/**/*", "people/*", "asked/*", "notebooks/*.ipynb"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "flash", "judges", "people", "ray")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["dual_ipo=dual_ipo._modidx:d"]},
    zip_safe=False,
)
