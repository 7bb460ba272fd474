"""Everything `pip` needs to know, read from `settings.ini`."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    packages=find_packages(include=["sd_nb", "sd_nb.*"]),
    include_package_data=True,
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": ["sd_nb=sd_nb._modidx:d"],  # lets the site link a name in backticks to its page
    },
)
