// Follow a stream by the rule of client.py, over a WebSocket or as Server-Sent Events.
// The page has onSamples(samples), and onState(text, live), where text is for people.
let epoch, position = 0, missed = 0, limit = 3; // seconds, of the wait for the next try

function take({data}) {
  const message = JSON.parse(data), {offset, samples} = message;
  if (typeof message.epoch !== "string" || !(offset >= 0) || !Array.isArray(samples)) {
    throw new TypeError(`cannot understand ${data.slice(0, 80)}`);
  }
  let start = position; // a new epoch starts at 0, but the first one ever where its message does
  if (message.epoch !== epoch) start = epoch === undefined ? offset : 0;
  const gap = Math.max(0, offset - start);
  const fresh = samples.slice(Math.max(0, start - offset)); // those before were counted already
  if (fresh.length) onSamples(fresh);
  [epoch, position] = [message.epoch, start + gap + fresh.length]; // not before it has counted
  [missed, limit] = [missed + gap, 3];
  onState("live", true);
}

// The address is relative to the page, so that it is right behind a proxy, too.
function address(name) {
  const url = new URL(name, location);
  if (epoch !== undefined) url.search = new URLSearchParams({epoch, offset: position});
  return url;
}

// Exponential backoff with full jitter: not all pages come back at once.
function again(connect, reason) {
  const due = Date.now() + Math.random() * limit * 1e3;
  limit = Math.min(2 * limit, 30);
  (function count() {
    const seconds = Math.ceil((due - Date.now()) / 1e3);
    if (seconds <= 0) return connect();
    onState(`reconnecting in ${seconds} s${reason}`, false);
    setTimeout(count, due - Date.now() - (seconds - 1) * 1e3);
  })();
}

function follow() {
  const url = address("websocket");
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  let reason = "";
  onState("connecting", false);
  socket.onmessage = (event) => {
    if (reason) return; // nothing may be counted after what could not be
    try {
      take(event);
    } catch (error) { // nothing was counted: the next connection asks for it again
      console.error(error);
      reason = `: ${error}`;
      socket.close();
    }
  };
  socket.onclose = (event) => again(follow, reason || (event.reason && `: ${event.reason}`));
}

function followEvents() {
  const source = new EventSource(address("events"));
  onState("connecting", false);
  source.onmessage = (event) => {
    try {
      take(event);
    } catch (error) {
      console.error(error);
      source.close();
      again(followEvents, `: ${error}`);
    }
  };
  source.onerror = () => { // the browser comes back by itself, but not after a 502 or a 503
    if (source.readyState === EventSource.CLOSED) again(followEvents, "");
    else onState("reconnecting", false);
  };
}
