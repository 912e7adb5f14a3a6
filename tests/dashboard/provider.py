"""A real OpenID Connect provider on this machine (oidc-provider-mock), whose answers a test may change."""

import contextlib
import threading

import flask
import oidc_provider_mock
import werkzeug.serving
from joserfc import jwt
from joserfc.jwk import RSAKey


class Provider:
    """`change_claims(claims, header) -> (claims, header)` changes the next ID tokens, which are signed again with the
    provider's key; `key`, if it is set, signs instead, and `token`, if it is set, is given instead. `change_metadata`
    changes what the provider says of itself. `seen` are the forms that its token endpoint was sent."""

    def __init__(self):
        self.reset()
        self.app = oidc_provider_mock.app()
        self.app.after_request(self._after)

    def reset(self):
        self.change_claims, self.key, self.token, self.algorithm, self.down = None, None, None, "RS256", False
        self.change_metadata = lambda metadata: None
        self.seen = []

    def add_user(self, subject, **claims):
        answer = self.app.test_client().put(f"/users/{subject}", json=claims)
        assert answer.status_code == 204

    def _after(self, response):
        path = flask.request.path
        if self.down:
            return flask.make_response("<h1>bad gateway</h1>", 502)
        if path == "/.well-known/openid-configuration":
            told = response.get_json()
            self.change_metadata(told)
            response.set_data(flask.json.dumps(told))
        if path == "/oauth2/token":
            self.seen.append((flask.request.form.to_dict(), flask.request.headers.get("authorization", "")))
            if response.status_code == 200 and (self.change_claims or self.token):
                answer = response.get_json()
                answer["id_token"] = self.token or self._forged(answer["id_token"])
                response.set_data(flask.json.dumps(answer))
        return response

    def _forged(self, token):
        own = RSAKey.import_key(flask.g.oidc_provider_mock_storage.jwk.as_dict(is_private=True))
        parsed = jwt.decode(token, own)
        claims, header = dict(parsed.claims), {**parsed.header, "alg": self.algorithm}
        self.change_claims(claims, header)
        return jwt.encode(header, claims, self.key or own, algorithms=[self.algorithm])


@contextlib.contextmanager
def running_provider():
    """(provider, its address) while the block is at work."""
    provider = Provider()
    server = werkzeug.serving.make_server("127.0.0.1", 0, provider.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield provider, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
