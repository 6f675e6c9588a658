// Follows a stream by the rule of client.py, over a WebSocket or as Server-Sent Events:
//
//     const client = new StreamClient();
//     client.onSamples = (samples) => { ... };
//     client.follow("websocket", WebSocket); // or ("events", EventSource)
//
// The addresses are relative to the page. StreamClient is the only name that this file defines.
class StreamClient {
  epoch = null; // which run of the stream the position belongs to
  position = 0; // the number of the next sample
  missed = 0; // samples that had left the server's history before they could come
  retryDelay = 3; // seconds, at most, of the first wait; each may be twice as long, up to 30 s

  // Replace this by a function that takes the next samples. epoch, position and missed already say
  // where the stream goes on after them. If it throws, the same samples come again.
  onSamples(samples) {}

  // Replace this to show the state: the text is for people, and live is true or false.
  onState(text, live) {}

  // Connect, take messages, wait, and try again: exponential backoff with full jitter.
  async follow(address, Connection) {
    let limit = this.retryDelay;
    while (true) {
      const {epoch, position} = this;
      const url = new URL(address, document.baseURI);
      if (Connection === WebSocket) url.protocol = url.protocol.replace("http", "ws");
      if (epoch !== null) {
        url.searchParams.set("epoch", epoch);
        url.searchParams.set("offset", position);
      }
      this.onState("connecting", false);
      const reason = await this.listen(new Connection(url));
      if (this.epoch !== epoch || this.position !== position) limit = this.retryDelay;
      const wait = Math.random() * Math.min(limit, 30); // or all pages come back at once
      limit = Math.min(2 * limit, 30);
      this.onState(`${reason}; next try in ${wait.toFixed(1)} s`, false);
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
    }
  }

  // Take messages until the connection ends, and return why it has ended.
  listen(connection) {
    return new Promise((resolve) => {
      function end(reason) {
        connection.onmessage = null; // nothing may be taken after what could not be
        connection.close();
        resolve(reason); // only the first reason counts
      }
      connection.onopen = () => this.onState("live", true);
      connection.onmessage = (event) => {
        try {
          this.take(event.data);
        } catch (error) {
          console.error(error);
          end(String(error));
        }
      };
      connection.onerror = () => end("connection lost");
      connection.onclose = (event) => { // of a WebSocket
        end(event.reason ? `closed by server: ${event.reason}` : "connection lost");
      };
    });
  }

  // Move to where a message begins, and hand over what is new in it.
  take(text) {
    const {epoch, offset, samples} = JSON.parse(text);
    if (typeof epoch !== "string" || !(offset >= 0) || !Array.isArray(samples)) {
      throw new TypeError(`cannot understand ${text.slice(0, 80)}`);
    }
    if (this.epoch === null) this.position = offset; // what came before is not missed
    else if (this.epoch !== epoch) this.position = 0; // a new run of the stream
    this.epoch = epoch;
    if (offset > this.position) {
      this.missed += offset - this.position;
      this.position = offset;
    }
    const first = this.position;
    const fresh = samples.slice(first - offset); // those before were taken already
    if (fresh.length === 0) return;
    this.position += fresh.length;
    try {
      this.onSamples(fresh);
    } catch (error) {
      this.position = first;
      throw error;
    }
  }
}
