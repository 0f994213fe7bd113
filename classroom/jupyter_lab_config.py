"""JupyterLab for students. Passed with --config; JupyterLab does not look for it by itself."""

from pathlib import Path

here = Path(__file__).resolve().parent / "jupyter"

c = get_config()  # noqa: F821 - given by traitlets

c.ServerApp.ip = "127.0.0.1"  # nobody else on the network, and a token besides
c.ServerApp.allow_remote_access = False
c.ServerApp.log_level = "WARN"  # the address is printed nevertheless
c.ServerApp.jpserver_extensions = {
    "jupyterlab": True,
    # the instructor's tools, which only slow a student's start
    "nbgrader.server_extensions.formgrader": False,
    "nbgrader.server_extensions.validate_assignment": False,
    "nbgrader.server_extensions.assignment_list": False,
    "nbgrader.server_extensions.course_list": False,
}
c.LabApp.app_settings_dir = str(here / "settings")
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
