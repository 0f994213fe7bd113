"""nbgrader for this course: `chapters/NN_name/assignment.ipynb` is the source, the rest is built.

The `nbgrader` command reads this file when it is started in this folder, and so does
`classroom.release`, so that there is one set of folders.
"""

from pathlib import Path

c = get_config()  # noqa: F821 - given by traitlets

c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.course_id = "minillm"
c.CourseDirectory.source_directory = "chapters"
c.CourseDirectory.release_directory = "build/release"
c.CourseDirectory.submitted_directory = "build/submitted"
c.CourseDirectory.autograded_directory = "build/autograded"
c.CourseDirectory.feedback_directory = "build/feedback"
c.CourseDirectory.db_url = f"sqlite:///{Path(__file__).resolve().parent}/build/gradebook.db"
c.CourseDirectory.notebook_id = "assignment"
c.CourseDirectory.ignore = [
    "lecture.ipynb",
    "claims.csv",
    ".ipynb_checkpoints",
    "__pycache__",
    "*.pyc",
]

c.ClearSolutions.code_stub = {
    "python": 'raise NotImplementedError("replace this line by your own code")'
}
c.ClearSolutions.text_stub = "*Your answer*"

c.Execute.timeout = 60
c.LimitOutput.max_lines = 200
c.LimitOutput.max_traceback = 50

# Feedback pages show what students printed: without scripts, they are safe to open.
c.HTMLExporter.sanitize_html = True
