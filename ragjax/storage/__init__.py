"""Files and folders that are complete or absent, whatever kills a process that writes them."""

from ragjax.storage.files import DiskFullError as DiskFullError
from ragjax.storage.files import link_first as link_first
from ragjax.storage.files import link_or_copy as link_or_copy
from ragjax.storage.files import replacing as replacing
from ragjax.storage.files import sha256 as sha256
from ragjax.storage.files import sync_file as sync_file
from ragjax.storage.files import sync_folder as sync_folder
from ragjax.storage.files import unique_name as unique_name
from ragjax.storage.files import whole_file as whole_file
from ragjax.storage.files import write_json as write_json
from ragjax.storage.files import write_jsonl as write_jsonl
from ragjax.storage.files import write_text as write_text
from ragjax.storage.lock import RunLock as RunLock
from ragjax.storage.lock import check_writable as check_writable
from ragjax.storage.log import JsonLog as JsonLog
from ragjax.storage.log import read_lines as read_lines
from ragjax.storage.manifests import check_listing as check_listing
from ragjax.storage.manifests import new_folder as new_folder
from ragjax.storage.manifests import publish as publish
from ragjax.storage.manifests import read_json as read_json
from ragjax.storage.manifests import verify_folder as verify_folder
from ragjax.storage.manifests import walk_digests as walk_digests
from ragjax.storage.names import nearest_name as nearest_name
from ragjax.storage.names import nearest_path as nearest_path
